"""Looking at data before it is trained on: every row checked, and a sheet of samples to look at."""
