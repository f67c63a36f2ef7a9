// A device guard for CUDA with one device whose streams and events are always done: autograd asks it while it runs a
// backward of fake tensors, and the real one would ask the driver.

#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::EventFlag;
using c10::Stream;

struct PretendedGuard final : c10::impl::DeviceGuardImplInterface {
    DeviceType type() const override { return DeviceType::CUDA; }
    Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
    Device exchangeDevice(Device) const override { return getDevice(); }
    void setDevice(Device) const override {}
    void uncheckedSetDevice(Device) const noexcept override {}
    DeviceIndex deviceCount() const noexcept override { return 1; }

    Stream getStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
    Stream getDefaultStream(Device device) const override { return getStream(device); }
    Stream exchangeStream(Stream stream) const override { return stream; }
    bool queryStream(const Stream &) const override { return true; }
    void synchronizeStream(const Stream &) const override {}

    void record(void **, const Stream &, const DeviceIndex, const EventFlag) const override {}
    void block(void *, const Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
    void synchronizeEvent(void *) const override {}
    void destroyEvent(void *, const DeviceIndex) const noexcept override {}
    void recordDataPtrOnStream(const c10::DataPtr &, const Stream &) const override {}
};

} // namespace

extern "C" void install_guard() {
    // Never freed: the registry keeps the pointer until the process ends.
    c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new PretendedGuard());
}
