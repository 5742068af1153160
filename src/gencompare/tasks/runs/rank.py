"""Entry of the further processes of a job (`python -m gencompare.tasks.runs.rank`)."""

from __future__ import annotations

from gencompare.tasks.main import main

if __name__ == "__main__":
    main()
