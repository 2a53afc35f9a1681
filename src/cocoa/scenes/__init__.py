"""The embedded synthetic world: `world`, what is said of it (`language`, `dialogues`), `tasks`, and `write`."""
