"""What only a GPU can say; the same tests run on the CPU where they make sense there."""
