"""Real workers and what they hold, for tests: ours and users'."""
