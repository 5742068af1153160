"""Entry of the further processes of a job (`python -m gencompare.tasks.rank`)."""

from gencompare.tasks.main import main

if __name__ == "__main__":
    main()
