"""How the model that ships with the package is trained."""
