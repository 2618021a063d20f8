"""What is read with a chunk: a replay buffer, rehearsed text, and their losses."""
