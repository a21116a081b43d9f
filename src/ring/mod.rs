//! The mailbox ring of target_core_user: bytes from the kernel become checked commands.
