//! SCSI: parses command descriptor blocks, executes them on a volume, and answers with status and sense. Knows no ring and no file.
