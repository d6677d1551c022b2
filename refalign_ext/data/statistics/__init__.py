"""What a data set holds, as a table and a plot."""
