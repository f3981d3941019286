"""Where samples come from: the embedded engine (local), or SGLang servers (client, server, sglang)."""
