"""Generation: from logits to tokens to text, chat, scores, and speculative decoding."""
