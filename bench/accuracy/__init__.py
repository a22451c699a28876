"""Effects of parts of the method, of heads and of prompts on labels."""
