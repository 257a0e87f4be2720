"""What the tests share: what they compare, over which cases, and in which processes."""
