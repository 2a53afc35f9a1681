"""The stages: each turns a checkpoint and a set of pairs into a checkpoint."""
