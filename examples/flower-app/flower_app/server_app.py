"""The ServerApp: fedmomentum's rounds over the SuperLink's grid."""

from fedmomentum.flower import make_server_app

app = make_server_app()
