"""What was learned, as a file: memories, snapshots, merging, ranks."""
