"""Export to, and import from, the libraries that people use: one file per library."""
