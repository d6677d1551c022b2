"""One generation from a request to files, on one device or many."""
