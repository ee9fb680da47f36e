"""Model files. They become flat files on the Hub, so each imports only siblings of this folder."""
