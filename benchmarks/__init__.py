"""Programs that measure, and the one that writes the README's tables from what they measured."""
