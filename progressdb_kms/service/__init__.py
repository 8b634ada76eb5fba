"""What is done: a worker answers, the keeper writes, a channel between them."""
