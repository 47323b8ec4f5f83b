"""What the experts do: recorded routing and reports."""
