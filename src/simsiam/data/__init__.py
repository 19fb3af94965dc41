"""The data pipeline: from the files of a data set to batches of views."""
