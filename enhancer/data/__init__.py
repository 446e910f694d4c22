"""Reading data sets of questions about videos."""
