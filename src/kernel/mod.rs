//! The control side of target_core_user: netlink events, configfs objects, UIO discovery.
