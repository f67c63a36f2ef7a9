"""Text of messages: numbers with nouns, and text from outside made safe to print."""
