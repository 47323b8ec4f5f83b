"""The HTTP door: OpenAI's API over one engine, and a page that shows the experts at work."""
