//! A `dev_config` string: what is accepted prints back to what parses to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcmu_dif::lun::config::DeviceConfig;

fuzz_target!(|text: &str| {
    if let Ok(config) = DeviceConfig::parse(text) {
        let printed = config.to_string();
        assert_eq!(DeviceConfig::parse(&printed).ok(), Some(config));
    }
});
