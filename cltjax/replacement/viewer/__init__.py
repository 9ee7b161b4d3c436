"""Pages that show graphs and features: static parts, and what puts them into one HTML file."""
