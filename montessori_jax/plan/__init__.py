"""What a config would take on chips that are not there: memory, communication, time, price."""
