"""For whom: the tasks of a model while it runs."""
