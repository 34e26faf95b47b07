"""The bundled reference pair: a small target and a smaller draft, trained from the standard library's sources."""
