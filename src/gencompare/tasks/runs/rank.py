"""Entry point of the other ranks of a job, and of parallel jobs: ``python -m gencompare.tasks.runs.rank``."""

from __future__ import annotations

from gencompare.tasks.main import main

if __name__ == "__main__":
    main()
