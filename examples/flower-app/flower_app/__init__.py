"""fedmomentum on Flower: the apps are made by the package, and this code is all that travels."""
