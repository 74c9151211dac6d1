"""Looks at a whole data set: statistics, checks, a contact sheet."""
