"""Everything process-shaped: command line, layout, rank processes, the engine's loop and the HTTP server."""
