"""Train, measure and compare generative models: `python run.py --help`."""

from gencompare.tasks.main import main

if __name__ == "__main__":
    main()
