"""Learning in the stream: a pre-trained model goes on learning from what it reads, and what it learned is a file."""
