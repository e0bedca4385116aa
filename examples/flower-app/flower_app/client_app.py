"""The ClientApp: one of fedmomentum's clients; the node config says which, and where its data is."""

from fedmomentum.flower import make_client_app

app = make_client_app()
