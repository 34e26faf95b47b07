"""The bundled reference pair: a small target and a smaller draft, trained by this project."""
