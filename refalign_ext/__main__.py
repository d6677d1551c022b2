"""`python -m refalign_ext`."""

from refalign_ext.cli import main

if __name__ == "__main__":
    main()
