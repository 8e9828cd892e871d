"""What is particular to each reproduced paper: a loss, its measures, its pictures."""
