"""File systems, files with checksums, JSON records, and copies that each machine keeps."""
