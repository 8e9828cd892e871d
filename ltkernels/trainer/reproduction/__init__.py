"""The pages of docs/reproduction: what others report, what the runs of this library gave, and what may be concluded."""
