"""Train the bundled reference pair."""
