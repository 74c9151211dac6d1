"""Ends a run that makes no progress, and says which rank is to blame."""
