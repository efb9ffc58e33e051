"""Tools that ossia runs itself: what the model asks for, done safely, and said back as text."""
