"""From instructions to preferences to PPO: what learns from scores instead of labels."""
