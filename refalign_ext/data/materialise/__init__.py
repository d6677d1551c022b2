"""Reference pictures out of videos, one by one or for a whole data set."""
