"""What a record holds, where the records of a data set are, and how they are read."""
