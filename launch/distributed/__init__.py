"""N processes as one: who they are, what they agree on, what comes to them from outside."""
