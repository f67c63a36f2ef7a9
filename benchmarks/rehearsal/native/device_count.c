/* Loaded before libc10_cuda, whose function of this name then counts the devices that `pretend_devices` has set. */
static signed char devices = 0;

void pretend_devices(int count) { devices = (signed char)count; }

/* c10::cuda::device_count(), a DeviceIndex */
signed char _ZN3c104cuda12device_countEv(void) { return devices; }
